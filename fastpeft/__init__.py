"""fastpeft: the performance engine for parameter-efficient fine-tuning.

PEFT's configs, API and adapter files on fused kernels. Names are loaded on first use (the list is `__init__.pyi`), so
`import fastpeft` costs nothing and imports neither torch nor transformers nor triton nor peft:

    model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(r=16, target_modules="all-linear"))
    fastpeft.patch(model)
    print(fastpeft.report(model))
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
