"""What some initialisations measure on the unadapted model first: statistics of the layers' inputs, or gradients.

Each leaves its measurement on the modules, where the adapter finds it when it is made:

    fastpeft.preprocess_corda(model, config, run_model=lambda: model(**batch))
    model = fastpeft.get_peft_model(model, config)
"""

from fastpeft.prepare.corda import preprocess_corda
from fastpeft.prepare.eva import get_eva_state_dict, initialize_lora_eva_weights
from fastpeft.prepare.loftq import replace_lora_weights_loftq
from fastpeft.prepare.lora_ga import preprocess_loraga

__all__ = [
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
]
