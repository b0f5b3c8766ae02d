"""Pictures of what a model makes and of how a run went."""
