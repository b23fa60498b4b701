"""Forward passes by structure: decoder layers computed without the model's own modules."""


class OtherStructure(Exception):
    """A model that is computed by its own modules."""
