"""What runs in processes of its own, and the memory that it shares with the engine."""
