"""A warning for each public name of rnn_ext that no page describes."""

from sphinx.util import logging

import rnn_ext

logger = logging.getLogger(__name__)
MODULES = (
    "rnn_ext",
    "rnn_ext.converters",
    "rnn_ext.functional",
    "rnn_ext.online",
    "rnn_ext.reference",
)


def public_names():
    for module in MODULES:
        found = rnn_ext if module == "rnn_ext" else getattr(rnn_ext, module.partition(".")[2])
        yield module
        yield from (f"{module}.{name}" for name in found.__all__)


def check(app, env):
    described = env.get_domain("py").objects
    for name in public_names():
        if name not in described:
            logger.warning("no page describes %s", name)


def setup(app):
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
