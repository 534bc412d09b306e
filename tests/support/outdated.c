/* An extension that was built from other sources, under the names of all extensions.

   All symbols that it could interpose end the process. */

#include <Python.h>
#include <stdlib.h>

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "outdated", .m_size = -1};

static PyObject *make(void)
{
    PyObject *module = PyModule_Create(&definition);

    if (module != NULL && PyModule_AddIntConstant(module, "INTERFACE", 99))
        Py_CLEAR(module);
    return module;
}

PyMODINIT_FUNC PyInit__extraops(void) { return make(); }
PyMODINIT_FUNC PyInit__iothreads(void) { return make(); }
PyMODINIT_FUNC PyInit__threads(void) { return make(); }
PyMODINIT_FUNC PyInit__crc32(void) { return make(); }
PyMODINIT_FUNC PyInit__sweep(void) { return make(); }
PyMODINIT_FUNC PyInit__maplines(void) { return make(); }

void fuse_session_new(void) { abort(); }
void fuse_session_new_versioned(void) { abort(); }
