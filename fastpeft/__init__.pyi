# The public names and where they live: read by type checkers, and at run time by lazy_loader (see __init__.py).
from .auto import (
    AutoPeftModel as AutoPeftModel,
    AutoPeftModelForCausalLM as AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification,
)
from .configs import (
    LoraConfig as LoraConfig,
    LoraRuntimeConfig as LoraRuntimeConfig,
    PeftConfig as PeftConfig,
    PeftType as PeftType,
    TaskType as TaskType,
)
from .errors import (
    AdapterFileError as AdapterFileError,
    BackendError as BackendError,
    FastpeftError as FastpeftError,
    NoMatchingPeftModuleError as NoMatchingPeftModuleError,
    PeftError as PeftError,
    PeftWarning as PeftWarning,
    UnsupportedOptionError as UnsupportedOptionError,
)
from .interop import install_as_peft as install_as_peft, uninstall_as_peft as uninstall_as_peft
from .kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from .mapping import (
    get_peft_config as get_peft_config,
    get_peft_model as get_peft_model,
    inject_adapter_in_model as inject_adapter_in_model,
)
from .model import PeftModel as PeftModel
from .ops.backend import available_backends as available_backends, backend as backend
from .patch import patch as patch, report as report, unpatch as unpatch
from .state_dict import (
    get_base_model_state_dict as get_base_model_state_dict,
    get_peft_model_state_dict as get_peft_model_state_dict,
    set_base_model_state_dict as set_base_model_state_dict,
    set_peft_model_state_dict as set_peft_model_state_dict,
)
from .status import get_layer_status as get_layer_status, get_model_status as get_model_status
from .storage import load_peft_weights as load_peft_weights
from .tasks import (
    PeftModelForCausalLM as PeftModelForCausalLM,
    PeftModelForFeatureExtraction as PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering as PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification as PeftModelForSequenceClassification,
    PeftModelForTokenClassification as PeftModelForTokenClassification,
)
from .tuner import LoraModel as LoraModel

__version__: str
