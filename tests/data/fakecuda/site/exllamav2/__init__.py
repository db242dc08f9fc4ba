from exllamav2.model import ext_c
