/* Walks the tables of an image that is likely to be sound, and says nothing about any other.
 *
 * A full image of 1 TiB has 16.7 million entries.  Each is looked at once, in a hundredth of
 * the time that Python takes to start.  Whatever is not plainly right ends the walk without
 * an answer: what is wrong, the check in Python finds out.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <unistd.h>

#define PIECE 65536u /* bytes of a table that are read at once; tables are no shorter or whole */
#define AHEAD 24 /* entries */
#define MOST_CLUSTERS (UINT64_C(1) << 28) /* a map of 32 MiB */
#define MOST_TABLE_BYTES (UINT64_C(1) << 30) /* in all: sparse tables are for the other check */

struct image {
    int fd;
    unsigned bits;       /* of an offset within a cluster */
    uint64_t clusters;   /* whole ones in the file */
    uint64_t table_bytes;
    uint64_t owned;      /* clusters that something refers to */
    uint64_t data;       /* those that hold data */
    uint64_t fragments;  /* data that does not follow what is before it in its table */
    uint8_t *map;        /* a bit for each cluster that is owned */
};

enum verdict { GOOD, UNSURE, INTERRUPTED };

/* Give a cluster an owner; false if it had one, or is none. */
static inline int claim(struct image *image, uint64_t offset)
{
    uint64_t cluster = offset >> image->bits;
    uint8_t bit = (uint8_t)(1u << (cluster & 7));

    if (offset & ((UINT64_C(1) << image->bits) - 1) || cluster >= image->clusters ||
        image->map[cluster >> 3] & bit)
        return 0;
    image->map[cluster >> 3] |= bit;
    image->owned++;
    return 1;
}

static int claim_range(struct image *image, uint64_t start, uint64_t end)
{
    for (; start < end; start += UINT64_C(1) << image->bits)
        if (!claim(image, start))
            return 0;
    return 1;
}

/* Read all of a piece of a table. */
static int read_piece(int fd, uint64_t offset, uint64_t *entries, size_t length)
{
    char *at = (char *)entries;

    while (length) {
        ssize_t count = pread(fd, at, length, (off_t)offset);
        if (count < 0 && errno == EINTR && !PyErr_CheckSignals())
            continue;
        if (count <= 0)
            return 0;
        at += count;
        offset += (uint64_t)count;
        length -= (size_t)count;
    }
    return 1;
}

/* Give the data clusters of one table their owner; only its first entries may be in use. */
static enum verdict walk_table(struct image *image, uint64_t table, uint64_t in_use)
{
    static uint64_t entries[PIECE / 8 + AHEAD];
    uint64_t size = UINT64_C(1) << image->bits, last = 0, index = 0;
    size_t length = image->table_bytes < PIECE ? (size_t)image->table_bytes : PIECE;

    for (uint64_t at = 0; at < image->table_bytes; at += length) {
        if (!read_piece(image->fd, table + at, entries, length))
            return PyErr_Occurred() ? INTERRUPTED : UNSURE;
        for (size_t place = 0; place < length / 8; place++, index++) {
            uint64_t value = entries[place];
            /* Clusters that lie in no order make this a walk through all of the map. */
            __builtin_prefetch(image->map + (entries[place + AHEAD] >> image->bits >> 3), 1);
            if (value <= 1)
                continue;
            if (index >= in_use || !claim(image, value))
                return UNSURE;
            image->data++;
            image->fragments += last && last + size != value;
            last = value;
        }
    }
    return PyErr_CheckSignals() ? INTERRUPTED : GOOD;
}

/* Walk all tables that the L1 table names; it has been read. */
static enum verdict walk(struct image *image, const uint64_t *l1, uint64_t disk_clusters)
{
    uint64_t count = image->table_bytes / 8, named = 0;

    for (uint64_t index = 0; index < count; index++) {
        uint64_t table = l1[index];
        if (!table)
            continue;
        if (++named * image->table_bytes > MOST_TABLE_BYTES || index * count >= disk_clusters ||
            table >> image->bits >= image->clusters ||
            !claim_range(image, table, table + image->table_bytes))
            return UNSURE;
    }
    for (uint64_t index = 0; index < count; index++) {
        if (!l1[index])
            continue;
        enum verdict found = walk_table(image, l1[index], disk_clusters - index * count);
        if (found != GOOD)
            return found;
    }
    return GOOD;
}

static PyObject *sweep(PyObject *module, PyObject *args)
{
    (void)module;
    struct image image = {0};
    unsigned long long header_end, l1_table, table_bytes, file_bytes, disk_clusters;
    enum verdict found = UNSURE;

    if (!PyArg_ParseTuple(args, "iIKKKKK", &image.fd, &image.bits, &header_end, &l1_table,
                          &table_bytes, &file_bytes, &disk_clusters))
        return NULL;
    image.table_bytes = table_bytes;
    image.clusters = file_bytes >> image.bits;
    if (image.clusters > MOST_CLUSTERS || table_bytes > MOST_TABLE_BYTES / 64 ||
        l1_table >> image.bits >= image.clusters)
        Py_RETURN_NONE;
    image.map = PyMem_RawCalloc(image.clusters / 8 + 1, 1);
    uint64_t *l1 = PyMem_RawMalloc(table_bytes);
    if (image.map && l1 && read_piece(image.fd, l1_table, l1, table_bytes) &&
        claim_range(&image, 0, header_end) &&
        claim_range(&image, l1_table, l1_table + table_bytes))
        found = walk(&image, l1, disk_clusters);
    PyMem_RawFree(l1);
    PyMem_RawFree(image.map);
    if (PyErr_Occurred())
        return NULL;
    if (found != GOOD)
        Py_RETURN_NONE;
    return Py_BuildValue("KKK", (unsigned long long)image.owned, (unsigned long long)image.data,
                         (unsigned long long)image.fragments);
}

static PyMethodDef methods[] = {
    {"sweep", sweep, METH_VARARGS,
     "sweep(fd, cluster_bits, header_end, l1_table, table_bytes, file_bytes, disk_clusters)\n"
     "Count clusters in use, data clusters and fragments; None if anything may be wrong."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_sweep", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__sweep(void)
{
    return PyModule_Create(&definition);
}
