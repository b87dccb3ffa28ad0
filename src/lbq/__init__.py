"""lbq: quantize language models offline, then decode them at memory speed."""
