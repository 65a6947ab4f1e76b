"""From files to prompts: rows, token ids and patches, corrupted pictures."""
