"""Arguments, their validation and parsing, and the table of Hugging Face names. Knows neither torch nor deepspeed."""
