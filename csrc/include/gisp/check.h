// Argument checks of the core: a failed check throws std::invalid_argument with the values that caused it.
#pragma once

#include <sstream>
#include <stdexcept>

#define GISP_CHECK(condition, message)                      \
  do {                                                      \
    if (!(condition)) {                                     \
      std::ostringstream gisp_check_stream;                 \
      gisp_check_stream << message;                         \
      throw std::invalid_argument(gisp_check_stream.str()); \
    }                                                       \
  } while (false)
