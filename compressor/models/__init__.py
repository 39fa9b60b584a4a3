"""The models that stages pass on: how they are built, changed in structure, saved and loaded."""
