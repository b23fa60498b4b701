"""What serves an artifact: one file a family of models, nothing of training in it.

An artifact's manifest names its loader as ``models.predictors.FILE:FUNCTION``: a function
of the artifact's folder that returns a :class:`~models.contracts.Predictor`. Loaders are
imported from this package and from nowhere else, so that an artifact from outside cannot
name code of its own choosing. They read safetensors, JSON, npz without pickles, ONNX and
skops files; heavy libraries are imported inside functions.
"""
