"""The definition of a phase: facts, effects, the ledger, the contexts, and the steps of a pipeline."""
