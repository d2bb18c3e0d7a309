// Memory that one thread keeps from call to call. It is not a std::vector because the functions of that class would be
// compiled once per instruction set under one name; the linker keeps any one of them, which a processor may not be able
// to run.
#pragma once

#include <cstdint>
#include <new>

namespace efft::EFFT_ISA {

// It grows and never shrinks: the pages of a fresh allocation of this size would fault on every call.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete[](data_, ALIGNED); }

  // Room for `size` elements, with undefined contents.
  T* room(int64_t size) {
    if (size > size_) {
      ::operator delete[](data_, ALIGNED);
      data_ = nullptr;
      size_ = 0;
      data_ = static_cast<T*>(::operator new[](size * sizeof(T), ALIGNED));
      size_ = size;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t ALIGNED{64};  // so that a register, and a row of a tile, is in one cache line

  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace efft::EFFT_ISA
