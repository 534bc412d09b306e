/* The CRC-32 of zlib, computed with the carry-less multiplication of x86-64 processors.
 *
 * zlib itself takes six times as long.  The method is that of "Fast CRC Computation for Generic
 * Polynomials Using PCLMULQDQ Instruction" (Intel, 2009), with the constants for reflected bits.
 * Four accumulators of 128 bits are folded over the data, 64 bytes in each step.  The four are then
 * folded into one, and a Barrett reduction turns it into 32 bits.
 *
 * The module can be imported only if gcc or clang has compiled it and the processor has PCLMULQDQ
 * and SSE4.1.  Otherwise its importer uses zlib.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define FOLD_BYTES 64u /* what one step folds; shorter inputs are computed bit by bit */
#define RELEASE_BYTES 4096 /* a shorter input is not worth the time for releasing the GIL */
#define POLYNOMIAL UINT32_C(0xedb88320) /* reflected */

/* Return the state (the inverted CRC) after `length` more bytes, computed bit by bit. */
static uint32_t by_bytes(uint32_t state, const uint8_t *bytes, size_t length)
{
    while (length--) {
        state ^= *bytes++;
        for (int bit = 0; bit < 8; bit++)
            state = state >> 1 ^ (POLYNOMIAL & -(state & 1));
    }
    return state;
}

/* Move an accumulator forward by the distance that `constants` stand for, and add `next`. */
__attribute__((target("pclmul,sse4.1"))) static inline __m128i fold(
    __m128i sum, __m128i constants, __m128i next)
{
    __m128i low = _mm_clmulepi64_si128(sum, constants, 0x00);
    __m128i high = _mm_clmulepi64_si128(sum, constants, 0x11);

    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

/* Return the state after `length` more bytes; `length` is a multiple of 16, at least FOLD_BYTES. */
__attribute__((target("pclmul,sse4.1"))) static uint32_t by_folding(
    uint32_t state, const uint8_t *bytes, size_t length)
{
    /* over_N has the constants for folding over a distance of N bytes. */
    const __m128i over_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i over_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i over_8 = _mm_set_epi64x(0, 0x0163cd6124);
    const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low_words = _mm_setr_epi32(~0, 0, ~0, 0);
    const __m128i *next = (const __m128i *)bytes;
    __m128i sums[4], sum, rest;

    for (int i = 0; i < 4; i++)
        sums[i] = _mm_loadu_si128(next++);
    sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128((int)state));
    for (length -= FOLD_BYTES; length >= FOLD_BYTES; length -= FOLD_BYTES)
        for (int i = 0; i < 4; i++)
            sums[i] = fold(sums[i], over_64, _mm_loadu_si128(next++));
    sum = sums[0];
    for (int i = 1; i < 4; i++)
        sum = fold(sum, over_16, sums[i]);
    for (; length; length -= 16)
        sum = fold(sum, over_16, _mm_loadu_si128(next++));

    /* From 128 to 64 bits. */
    rest = _mm_clmulepi64_si128(sum, over_16, 0x10);
    sum = _mm_xor_si128(_mm_srli_si128(sum, 8), rest);
    rest = _mm_srli_si128(sum, 4);
    sum = _mm_clmulepi64_si128(_mm_and_si128(sum, low_words), over_8, 0x00);
    sum = _mm_xor_si128(sum, rest);
    /* From 64 to 32 bits. */
    rest = _mm_clmulepi64_si128(_mm_and_si128(sum, low_words), barrett, 0x10);
    rest = _mm_clmulepi64_si128(_mm_and_si128(rest, low_words), barrett, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(sum, rest), 1);
}

static uint32_t checksum(uint32_t value, const uint8_t *bytes, size_t length)
{
    uint32_t state = ~value;
    size_t folded = length >= FOLD_BYTES ? length & ~(size_t)15 : 0;

    if (folded)
        state = by_folding(state, bytes, folded);
    return ~by_bytes(state, bytes + folded, length - folded);
}

static PyObject *crc32(PyObject *module, PyObject *args)
{
    Py_buffer data;
    unsigned value = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*|I:crc32", &data, &value))
        return NULL;
    if (data.len >= RELEASE_BYTES) {
        Py_BEGIN_ALLOW_THREADS
        value = checksum(value, data.buf, (size_t)data.len);
        Py_END_ALLOW_THREADS
    } else {
        value = checksum(value, data.buf, (size_t)data.len);
    }
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(value);
}

static int is_supported(void)
{
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

static PyMethodDef methods[] = {
    {"crc32", crc32, METH_VARARGS,
     "crc32(data, value=0)\n--\n\nReturn what zlib.crc32 returns, faster."},
    {NULL, NULL, 0, NULL},
};

#else

static PyMethodDef methods[] = {{NULL, NULL, 0, NULL}};

static int is_supported(void)
{
    return 0;
}

#endif

/* The same number as in unitfile.py, and increased together with it (util/extensions.py). */
#define INTERFACE 1

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "qedfuse.remote._crc32", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__crc32(void)
{
    PyObject *module;

    if (!is_supported()) {
        PyErr_SetString(PyExc_ImportError, "not built for this processor: it needs PCLMULQDQ and SSE4.1");
        return NULL;
    }
    module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "INTERFACE", INTERFACE))
        Py_CLEAR(module);
    return module;
}
