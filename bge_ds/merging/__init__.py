"""Averages of models of one shape: comparing their files, weights from losses on examples, averaging tensor by tensor."""
