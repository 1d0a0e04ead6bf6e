"""Views of an image: their parameters drawn in numpy, and applied to a batch on the CPU or by Triton kernels on CUDA.

`draw` and `crop_box` say what is done to each view, `augment` does it to uint8 crops, `normalize` is what an evaluation
does instead.
"""

from dist_ssl.augment.parameters import crop_box, draw
from dist_ssl.augment.views import augment, normalize

__all__ = ["augment", "crop_box", "draw", "normalize"]
