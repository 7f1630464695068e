# The public names and where they live: read by type checkers, and at run time by lazy_loader (see __init__.py).
from .auto import (
    AutoPeftModel as AutoPeftModel,
)
from .auto import (
    AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
)
from .auto import (
    AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
)
from .auto import (
    AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
)
from .auto import (
    AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
)
from .auto import (
    AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
)
from .auto import (
    AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
)
from .configs import (
    CordaConfig as CordaConfig,
)
from .configs import (
    EvaConfig as EvaConfig,
)
from .configs import (
    LoftQConfig as LoftQConfig,
)
from .configs import (
    LoraConfig as LoraConfig,
)
from .configs import (
    LoraGAConfig as LoraGAConfig,
)
from .configs import (
    LoraRuntimeConfig as LoraRuntimeConfig,
)
from .configs import (
    PeftConfig as PeftConfig,
)
from .configs import (
    PeftType as PeftType,
)
from .configs import (
    TaskType as TaskType,
)
from .convert import convert_to_lora as convert_to_lora
from .convert import save_as_lora as save_as_lora
from .errors import (
    AdapterFileError as AdapterFileError,
)
from .errors import (
    BackendError as BackendError,
)
from .errors import (
    FastpeftError as FastpeftError,
)
from .errors import (
    NoMatchingPeftModuleError as NoMatchingPeftModuleError,
)
from .errors import (
    PeftError as PeftError,
)
from .errors import (
    PeftWarning as PeftWarning,
)
from .errors import (
    UnsupportedOptionError as UnsupportedOptionError,
)
from .interop import install_as_peft as install_as_peft
from .interop import uninstall_as_peft as uninstall_as_peft
from .kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from .mapping import (
    get_peft_config as get_peft_config,
)
from .mapping import (
    get_peft_model as get_peft_model,
)
from .mapping import (
    inject_adapter_in_model as inject_adapter_in_model,
)
from .model import PeftModel as PeftModel
from .ops.backend import available_backends as available_backends
from .ops.backend import backend as backend
from .patch import patch as patch
from .patch import report as report
from .patch import unpatch as unpatch
from .prepare import get_eva_state_dict as get_eva_state_dict
from .prepare import initialize_lora_eva_weights as initialize_lora_eva_weights
from .prepare import preprocess_corda as preprocess_corda
from .prepare import preprocess_loraga as preprocess_loraga
from .prepare import replace_lora_weights_loftq as replace_lora_weights_loftq
from .state_dict import (
    get_base_model_state_dict as get_base_model_state_dict,
)
from .state_dict import (
    get_peft_model_state_dict as get_peft_model_state_dict,
)
from .state_dict import (
    set_base_model_state_dict as set_base_model_state_dict,
)
from .state_dict import (
    set_peft_model_state_dict as set_peft_model_state_dict,
)
from .status import get_layer_status as get_layer_status
from .status import get_model_status as get_model_status
from .storage import load_peft_weights as load_peft_weights
from .tasks import (
    PeftModelForCausalLM as PeftModelForCausalLM,
)
from .tasks import (
    PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
)
from .tasks import (
    PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
)
from .tasks import (
    PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
)
from .tasks import (
    PeftModelForSequenceClassification as PeftModelForSequenceClassification,
)
from .tasks import (
    PeftModelForTokenClassification as PeftModelForTokenClassification,
)
from .tuner import LoraModel as LoraModel

__version__: str
