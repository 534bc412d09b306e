/* The fast check: reads all tables of an image, and confirms that they are valid, or gives up.
 *
 * Reading all tables here takes less time than loading numpy and trio for the full check.  The
 * sweep gives up at the first entry that may be invalid, or is in use for a range past the end of
 * the disk.  The caller then runs the full check.
 *
 * The owner of a cluster is the header, the table or the L2 entry that uses it.  An entry is valid
 * if the file offset that it holds is aligned, and if all clusters to which it refers lie wholly in
 * the file and have no owner yet.  The header and the tables get their clusters first.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <unistd.h>

#define READ_BYTES 65536u /* maximum for one read of an L2 table */
#define PREFETCH_ENTRIES 24 /* how many entries ahead the owner bitmap is prefetched */
#define MAX_CLUSTERS (UINT64_C(1) << 28) /* in a file; the owner bitmap then takes 32 MiB */
#define MAX_TABLES_BYTES (UINT64_C(1) << 30) /* total length of all L2 tables, holes included */

struct image {
    int fd;
    unsigned cluster_bits;
    uint64_t clusters;   /* number of whole clusters in the file */
    uint64_t table_bytes; /* length of the L1 table, and of each L2 table */
    uint64_t owned;      /* number of clusters with an owner */
    uint64_t data;       /* number of data clusters */
    uint64_t fragments;  /* number of data clusters that do not follow, in the file, the previous
                          * one of their table; the first one of a table does not count */
    uint8_t *owners;     /* bitmap: the clusters with an owner */
};

/* UNKNOWN: the full check is necessary.  INTERRUPTED: a signal handler has raised an exception. */
enum verdict { SOUND, UNKNOWN, INTERRUPTED };

/* Give the cluster at a file offset an owner, and return 1.  Return 0 and change nothing if the
 * offset is not aligned, or the cluster has an owner or does not lie wholly in the file. */
static inline int claim(struct image *image, uint64_t offset)
{
    uint64_t cluster = offset >> image->cluster_bits;
    uint8_t bit = (uint8_t)(1u << (cluster & 7));

    if (offset & ((UINT64_C(1) << image->cluster_bits) - 1) || cluster >= image->clusters ||
        image->owners[cluster >> 3] & bit)
        return 0;
    image->owners[cluster >> 3] |= bit;
    image->owned++;
    return 1;
}

/* Give the clusters from file offset start to end (exclusive) an owner; return 0 if claim does. */
static int claim_range(struct image *image, uint64_t start, uint64_t end)
{
    for (; start < end; start += UINT64_C(1) << image->cluster_bits)
        if (!claim(image, start))
            return 0;
    return 1;
}

/* Read length bytes at a file offset, and return 1.  Return 0 at the end of the file, after an
 * error, and after an exception of a signal handler. */
static int read_fully(int fd, uint64_t offset, uint64_t *entries, size_t length)
{
    char *next = (char *)entries;

    while (length) {
        ssize_t count = pread(fd, next, length, (off_t)offset);
        if (count < 0 && errno == EINTR && !PyErr_CheckSignals())
            continue;
        if (count <= 0)
            return 0;
        next += count;
        offset += (uint64_t)count;
        length -= (size_t)count;
    }
    return 1;
}

/* Give the data clusters of one L2 table an owner.  clusters_left is the number of clusters from
 * the first guest offset of the table to the disk's end. */
static enum verdict sweep_table(struct image *image, uint64_t table_offset, uint64_t clusters_left)
{
    static uint64_t entries[READ_BYTES / 8 + PREFETCH_ENTRIES];
    uint64_t size = UINT64_C(1) << image->cluster_bits, last = 0, index = 0;
    size_t length = image->table_bytes < READ_BYTES ? (size_t)image->table_bytes : READ_BYTES;

    for (uint64_t done = 0; done < image->table_bytes; done += length) {
        if (!read_fully(image->fd, table_offset + done, entries, length))
            return PyErr_Occurred() ? INTERRUPTED : UNKNOWN;
        for (size_t slot = 0; slot < length / 8; slot++, index++) {
            uint64_t value = entries[slot];
            uint64_t ahead = entries[slot + PREFETCH_ENTRIES];
            /* If the data is fragmented, the bitmap is accessed at random, so the byte for a later
             * entry is prefetched.  Even a prefetch of an invalid address does no harm. */
            __builtin_prefetch(image->owners + (ahead >> image->cluster_bits >> 3), 1);
            if (value <= 1) /* unallocated, or a zero cluster */
                continue;
            if (index >= clusters_left || !claim(image, value))
                return UNKNOWN;
            image->data++;
            image->fragments += last && last + size != value;
            last = value;
        }
    }
    return PyErr_CheckSignals() ? INTERRUPTED : SOUND;
}

/* Sweep all L2 tables; disk_clusters is the size of the disk in clusters.  The tables get their
 * clusters before any data cluster gets an owner, so that an L2 entry that refers to a table is
 * found. */
static enum verdict sweep_tables(struct image *image, const uint64_t *l1, uint64_t disk_clusters)
{
    uint64_t entries = image->table_bytes / 8, tables = 0;

    for (uint64_t index = 0; index < entries; index++) {
        uint64_t table_offset = l1[index];
        if (!table_offset)
            continue;
        if (++tables * image->table_bytes > MAX_TABLES_BYTES ||
            index * entries >= disk_clusters ||
            table_offset >> image->cluster_bits >= image->clusters ||
            !claim_range(image, table_offset, table_offset + image->table_bytes))
            return UNKNOWN;
    }
    for (uint64_t index = 0; index < entries; index++) {
        if (!l1[index])
            continue;
        enum verdict found = sweep_table(image, l1[index], disk_clusters - index * entries);
        if (found != SOUND)
            return found;
    }
    return SOUND;
}

static PyObject *sweep(PyObject *module, PyObject *args)
{
    (void)module;
    struct image image = {0};
    unsigned long long header_end, l1_table, table_bytes, file_bytes, disk_clusters;
    enum verdict found = UNKNOWN;

    if (!PyArg_ParseTuple(args, "iIKKKKK", &image.fd, &image.cluster_bits, &header_end, &l1_table,
                          &table_bytes, &file_bytes, &disk_clusters))
        return NULL;
    image.table_bytes = table_bytes;
    image.clusters = file_bytes >> image.cluster_bits;
    /* The whole L1 table is read into memory, so one of more than 16 MiB is left to the full
     * check. */
    if (image.clusters > MAX_CLUSTERS || table_bytes > MAX_TABLES_BYTES / 64 ||
        l1_table >> image.cluster_bits >= image.clusters)
        Py_RETURN_NONE;
    image.owners = PyMem_RawCalloc(image.clusters / 8 + 1, 1);
    uint64_t *l1 = PyMem_RawMalloc(table_bytes);
    if (image.owners && l1 && read_fully(image.fd, l1_table, l1, table_bytes) &&
        claim_range(&image, 0, header_end) &&
        claim_range(&image, l1_table, l1_table + table_bytes))
        found = sweep_tables(&image, l1, disk_clusters);
    PyMem_RawFree(l1);
    PyMem_RawFree(image.owners);
    if (PyErr_Occurred())
        return NULL;
    if (found != SOUND)
        Py_RETURN_NONE;
    return Py_BuildValue("KKK", (unsigned long long)image.owned, (unsigned long long)image.data,
                         (unsigned long long)image.fragments);
}

static PyMethodDef methods[] = {
    {"sweep", sweep, METH_VARARGS,
     "sweep(fd, cluster_bits, header_end, l1_table, table_bytes, file_bytes, disk_clusters)\n"
     "Return the number of clusters with an owner, of data clusters, and of fragments; None if\n"
     "the caller must run the full check.  header_end and l1_table are file offsets, table_bytes is\n"
     "the length of each table, and disk_clusters is the size of the disk in clusters.\n\n"
     "A fragment is a data cluster that does not directly follow, in the file, the previous\n"
     "data cluster of its L2 table.  The first data cluster of a table does not count."},
    {NULL, NULL, 0, NULL},
};

/* The same number as in fastcheck.py, and raised together with it (util/extensions.py). */
#define INTERFACE 1

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_sweep", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__sweep(void)
{
    PyObject *module;

    module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "INTERFACE", INTERFACE))
        Py_CLEAR(module);
    return module;
}
