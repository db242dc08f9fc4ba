from exllamav2.ext import ext_c

print("exllamav2 says something")
