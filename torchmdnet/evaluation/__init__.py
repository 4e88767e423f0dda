"""How far the predictions of models are from reference data: what the command ``eval`` does."""
