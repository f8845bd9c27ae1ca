"""Reports for people: pages, pictures, comparisons, tables. They read records and nothing else."""
