"""How a sweep chooses its trials and keeps every device busy."""
