"""The operating system: process memory, locks, versions, pipes, threads, secrets."""
