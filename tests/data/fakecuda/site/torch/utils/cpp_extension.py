import importlib.util, os, subprocess


def _run_ninja_build(build_directory, verbose, error_prefix):
    try:
        subprocess.run(["ninja", "-v", "-j", os.environ.get("MAX_JOBS", "2")], cwd=build_directory, check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error_prefix) from error


def load(name, sources, extra_include_paths, verbose, extra_ldflags, extra_cuda_cflags, extra_cflags):
    folder = os.path.join(os.environ["TORCH_EXTENSIONS_DIR"], name)
    os.makedirs(folder, exist_ok=True)
    lock = os.path.join(folder, "lock")
    handle = os.open(lock, os.O_CREAT | os.O_EXCL)
    try:
        archs = os.environ["TORCH_CUDA_ARCH_LIST"].split(";")
        codes = " ".join(f"-gencode=arch=compute_{a[0]}{a[2]},code=sm_{a[0]}{a[2]}" for a in archs)
        stems = [os.path.splitext(os.path.basename(source))[0] for source in sources]
        objects = [stem + (".cuda.o" if s.endswith(".cu") else ".o") for stem, s in zip(stems, sources)]
        lines = ["cxx = " + os.environ.get("CXX", "c++"), "nvcc = " + os.environ["CUDA_HOME"] + "/bin/nvcc"]
        lines += ["cuda_cflags = " + codes, "rule compile", "  command = $cxx -fPIC -c $in -o $out"]
        lines += ["rule cuda_compile", "  command = $nvcc $cuda_cflags -fPIC -c $in -o $out"]
        lines += ["rule link", "  command = $cxx -shared $in -o $out"]
        for source, target in zip(sources, objects):
            lines += [f"build {target}: {'cuda_compile' if source.endswith('.cu') else 'compile'} {source}"]
        lines += [f"build {name}.so: link {' '.join(objects)}", f"default {name}.so", ""]
        with open(os.path.join(folder, "build.ninja"), "w") as file:
            file.write(chr(10).join(lines))
        _run_ninja_build(folder, verbose, f"Error building extension {name!r}")
    finally:
        os.close(handle)
        os.remove(lock)
    return _import_module_from_library(name, folder, True)


def _import_module_from_library(name, folder, is_python_module):
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, name + ".so"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
