"""The demo page: hear, see and compare what the tokenizer makes of a clip, enhance speech, generate from text.

`launch_page(Workbench.load())` is what `dasheng-tokenizer demo` runs, `build_page(Workbench.load()).launch()` what a
Space does.
"""

from dasheng_tokenizer.demo.page import build_page, launch_page
from dasheng_tokenizer.demo.workbench import Workbench

__all__ = ["Workbench", "build_page", "launch_page"]
