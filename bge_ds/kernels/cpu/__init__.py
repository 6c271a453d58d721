"""What pays off on CPUs only: attention in cache-sized blocks, cheap dropout."""
