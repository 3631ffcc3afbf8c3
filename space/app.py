"""The demo page as a Space: `sdk: gradio` runs this file."""

from dasheng_tokenizer.demo import Workbench, build_page

build_page(Workbench.load()).launch(max_file_size="32mb")
