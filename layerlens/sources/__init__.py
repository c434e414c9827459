"""Where models come from: a directory or the hub, a package, timm, ultralytics, a function of the user.

Each source is one ``ModelSource`` in ``layerlens.registry.SOURCES``, under the prefix by which references name it
(``timm:NAME``). ``load_pretrained`` loads whatever a reference names; the configuration, the server's confinement and
the command line ask the source what they need to know about it.
"""

from layerlens.sources.source import LoadRequest, ModelSource, Trust, load_model, load_pretrained

__all__ = ["LoadRequest", "ModelSource", "Trust", "load_model", "load_pretrained"]
