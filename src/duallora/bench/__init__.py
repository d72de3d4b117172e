"""What the methods cost beside the frozen backbone and plain LoRA: time, memory, bytes and operations."""
