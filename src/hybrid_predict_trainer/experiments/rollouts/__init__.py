"""Does going on along the trajectory pay in reinforcement learning?  A small task with exact scores, and its nulls."""
