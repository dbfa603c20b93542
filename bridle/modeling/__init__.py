"""Pure torch modules and mathematics: knows nothing of files, clips, DeepSpeed or HTTP."""
