"""What pays on CPUs only: attention in cache-sized blocks, cheap dropout."""
