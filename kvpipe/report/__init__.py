"""What people read: plans and their changes. It reads records and nothing else."""
