"""Thin adapters to training libraries; each is imported only when asked for.

``sentence_transformers``, ``timm``, ``lightning`` and ``torchdistill`` here are modules of this
package that import the library of the same name, which must be installed.
"""
