// The extension, with marks for what a test adds. Of Python.h, whose compilation would take longer than all else, only
// what it needs.
extern "C" {
    struct PyObject;
    struct PyMethodDef { const char* name; PyObject* (*call)(PyObject*, PyObject*); int flags; const char* doc; };
    struct PyModuleDef {
        long references; void *type, *init; long index; void* copy;
        const char *name, *doc; long size; PyMethodDef* methods; void *slots, *traverse, *clear, *free;
    };
    int PyArg_ParseTuple(PyObject*, const char*, ...);
    PyObject* PyObject_CallMethod(PyObject*, const char*, const char*, ...);
    void Py_IncRef(PyObject*);
    PyObject* PyModule_Create2(PyModuleDef*, int);
    PyObject* PyInit_exllamav2_ext();
}
@declarations@
static PyObject* softcap(PyObject* self, PyObject* args) {
    PyObject* x; double scale;
    if (!PyArg_ParseTuple(args, "Od", &x, &scale)) return nullptr;
    @body@
}
static PyMethodDef methods[] = {{"softcap_", softcap, 1, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {1, nullptr, nullptr, 0, nullptr, "exllamav2_ext", "", -1, methods};
PyObject* PyInit_exllamav2_ext() { @init@ return PyModule_Create2(&module, 1013); }
