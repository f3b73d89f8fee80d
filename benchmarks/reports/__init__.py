"""What the Monitor's reports cost: CPU seconds for each, and memory over many."""
