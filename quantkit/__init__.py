"""QuantKit: INT8, INT4 and FP8 quantization of Hugging Face language models.

    import quantkit
    model = AutoModelForCausalLM.from_pretrained("a-quantkit-directory")

The import is what teaches transformers the format.
"""

__version__ = "0.1.0"

from quantkit.convert import convert
from quantkit.errors import QuantKitError
from quantkit.hf import QuantKitConfig
from quantkit.linear import QuantLinear, set_fp8_accumulation
from quantkit.load import load
from quantkit.optimize import optimize
from quantkit.packing import QuantizedTensor
from quantkit.quantize import quantize
from quantkit.recipe import CalibrationSpec, Recipe, Rule
from quantkit.scheme import Scheme, parse_scheme
from quantkit.streaming import quantize_checkpoint

__all__ = [
    "CalibrationSpec",
    "QuantKitConfig",
    "QuantKitError",
    "QuantLinear",
    "QuantizedTensor",
    "Recipe",
    "Rule",
    "Scheme",
    "convert",
    "load",
    "optimize",
    "parse_scheme",
    "quantize",
    "quantize_checkpoint",
    "set_fp8_accumulation",
]
