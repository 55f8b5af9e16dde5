"""What an experiment would need and take on devices that are not here."""
