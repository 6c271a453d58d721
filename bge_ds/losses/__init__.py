"""The contrastive loss, its gather across ranks, and GradCache. Knows no engine."""
