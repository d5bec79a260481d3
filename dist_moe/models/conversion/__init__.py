"""Passes that turn dense feed-forward networks into experts: pure functions on weights, one file each."""

from dist_moe.models.conversion.bert import BertConversionConfig, convert_bert, place_converted
from dist_moe.models.conversion.copies import copies
from dist_moe.models.conversion.decoder import DecoderConversionConfig, convert_decoder
from dist_moe.models.conversion.exact_split import split_exactly
from dist_moe.models.conversion.importance import neuron_importance
from dist_moe.models.conversion.neurons import take_neurons
from dist_moe.models.conversion.partition import partition, ranked

__all__ = [
    "BertConversionConfig",
    "DecoderConversionConfig",
    "convert_bert",
    "convert_decoder",
    "copies",
    "neuron_importance",
    "partition",
    "place_converted",
    "ranked",
    "split_exactly",
    "take_neurons",
]
