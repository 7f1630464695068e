"""What some initialisations measure on the unadapted model first: statistics of the layers' inputs, or gradients.

Each leaves its measurement on the modules, where the adapter finds it when it is made:

    fastpeft.preprocess_corda(model, config, run_model=lambda: model(**batch))
    model = fastpeft.get_peft_model(model, config)
"""

from fastpeft.prepare.corda import preprocess_corda
from fastpeft.prepare.lora_ga import preprocess_loraga

__all__ = ["preprocess_corda", "preprocess_loraga"]
