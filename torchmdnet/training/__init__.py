"""Training: the Lightning module, what a run writes and how it is continued."""
