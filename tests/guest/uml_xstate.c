/*
 * Preloaded into linux.uml, so that it runs on processors with AMX.
 *
 * Linux takes a program's extended registers (PTRACE_SETREGSET, NT_X86_XSTATE) only in a buffer of the processor's full size,
 * which is 11 KiB with AMX; UML up to 6.13 knows a fixed size below 3 KiB and ends with "ptrace set fp regs failed". Here its
 * buffers are made as long as the kernel's. The guest's programs never use the part that UML can't hold: Linux gives AMX only
 * to a program that asks for it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

#define GETREGSET 0x4204
#define SETREGSET 0x4205
#define XSTATE 0x202

/* The header of the extended registers: which of them are there. */
#define FEATURES_AT 512
#define FEATURES_OF_UML UINT64_C(0x2ff)

static long (*next)(int, pid_t, void *, void *);
static __thread char registers[64 * 1024];

static void hide_unknown_features(char *state)
{
    uint64_t features;

    memcpy(&features, state + FEATURES_AT, sizeof features);
    features &= FEATURES_OF_UML;
    memcpy(state + FEATURES_AT, &features, sizeof features);
}

static long get(pid_t pid, struct iovec *wanted)
{
    struct iovec whole = { registers, sizeof registers };
    long result = next(GETREGSET, pid, (void *)XSTATE, &whole);

    if (result < 0)
        return result;
    if (wanted->iov_len > whole.iov_len)
        wanted->iov_len = whole.iov_len;
    hide_unknown_features(registers);
    memcpy(wanted->iov_base, registers, wanted->iov_len);
    return result;
}

static long set(pid_t pid, const struct iovec *given)
{
    struct iovec whole = { registers, sizeof registers };
    long result = next(GETREGSET, pid, (void *)XSTATE, &whole);

    if (result < 0)
        return result;
    if (given->iov_len < whole.iov_len)
        memset(registers, 0, whole.iov_len);
    memcpy(registers, given->iov_base, given->iov_len < whole.iov_len ? given->iov_len : whole.iov_len);
    hide_unknown_features(registers);
    return next(SETREGSET, pid, (void *)XSTATE, &whole);
}

long ptrace(int request, pid_t pid, void *address, void *data)
{
    if (!next)
        next = (long (*)(int, pid_t, void *, void *))dlsym(RTLD_NEXT, "ptrace");
    if ((uintptr_t)address == XSTATE && request == GETREGSET)
        return get(pid, data);
    if ((uintptr_t)address == XSTATE && request == SETREGSET)
        return set(pid, data);
    return next(request, pid, address, data);
}
