"""The adapter layers: the `nn.Module`s that stand where a model's layers stood."""

from fastpeft.layers import weight_inits as weight_inits  # registers the methods of `init_lora_weights`
from fastpeft.layers.attention import MultiheadAttention
from fastpeft.layers.base import BaseTunerLayer, check_adapters_to_merge
from fastpeft.layers.conv import Conv1d, Conv2d, Conv3d
from fastpeft.layers.embedding import Embedding
from fastpeft.layers.experts import ParamWrapper
from fastpeft.layers.linear import Linear
from fastpeft.layers.lora import LoraLayer
from fastpeft.layers.tokens import TrainableTokensLayer, TrainableTokensWrapper
from fastpeft.layers.variants import LoraVariant
from fastpeft.layers.wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

__all__ = [
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraLayer",
    "LoraVariant",
    "ModulesToSaveWrapper",
    "MultiheadAttention",
    "ParamWrapper",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
    "check_adapters_to_merge",
]
