"""One endpoint over all pools: OpenAI's API, routing, and streams that outlive the pool they began on.

Other rooms use `create_app(manager, tokenizer, model_name, settings)` and `Settings`. The gateway owns text (workers
know token ids only); see README.md for the way of a request through the files.
"""

from anypool.gateway.app import create_app
from anypool.gateway.settings import Settings

__all__ = ["Settings", "create_app"]
