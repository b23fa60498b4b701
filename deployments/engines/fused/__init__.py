"""Forward passes by structure: decoder layers computed without the model's own modules."""
