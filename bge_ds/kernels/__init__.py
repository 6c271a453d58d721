"""One file an operation: the plain version, the fused ones, and one public function that chooses between them."""
