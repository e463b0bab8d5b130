"""What 7B parameters and eight GPUs need: ranks, the optimizer's memory, the plan."""
