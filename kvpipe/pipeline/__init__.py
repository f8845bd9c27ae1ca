"""What a phase is: facts, effects, the ledger, the contexts, and the steps of a pipeline."""
