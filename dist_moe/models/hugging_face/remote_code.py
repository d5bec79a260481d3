"""The module that goes along with a model of our own architecture: transformers runs it, and it finds dist_moe."""

MODULE = "modeling_dist_moe"
AUTO_MAP = {"AutoConfig": f"{MODULE}.DistMoEConfig", "AutoModelForCausalLM": f"{MODULE}.DistMoEForCausalLM"}
SOURCE = '''"""A decoder whose feed-forward layers are mixtures of experts of the package comet-dist-moe."""

try:
    from dist_moe.models.hugging_face.modeling_dist_moe import DistMoEConfig, DistMoEForCausalLM
except ImportError as error:
    raise ImportError(
        "this model needs the package comet-dist-moe, whose import name is dist_moe (and not PyPI's dist-moe): "
        f"{error}"
    ) from error

__all__ = ["DistMoEConfig", "DistMoEForCausalLM"]
'''
